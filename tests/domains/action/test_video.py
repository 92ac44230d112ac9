import io
import pickle

import numpy as np
import pytest
from made_videos import write_video
from PIL import Image

from vertebra.domains.action import video
from vertebra.domains.action.video import EncodedFrames, VideoFrames
from vertebra.errors import DataError

PICTURE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def png():
    stream = io.BytesIO()
    Image.fromarray(PICTURE).save(stream, "PNG")
    return stream.getvalue()


def test_pictures_and_damaged_ones():
    frames = EncodedFrames([png()] * 5, "set: front")
    assert np.array_equal(frames[3], PICTURE)
    for files in ([frames.files[0], b"no picture"], [frames.files[0], frames.files[1][:60]]):
        broken = EncodedFrames(files, "set: front")
        assert broken[-2].shape == (6, 8, 3)
        with pytest.raises(DataError, match="set: front: the picture of step 1 is damaged"):
            broken[-1]
    with pytest.raises(IndexError):
        frames[5]
    assert [f.shape for f in frames[3:]] == [(6, 8, 3)] * 2


def test_damaged_videos(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, [50, 60, 70])
    frames = VideoFrames(path, np.array([0.0, 0.2, 0.4]), 0.05)
    assert frames[1].mean() == pytest.approx(70, abs=4)
    with pytest.raises(DataError, match=r"a.mp4: has no frame within 0.050 s of 0.400 s"):
        frames[2]
    assert frames[0].mean() == pytest.approx(50, abs=4)  # and goes on
    short = tmp_path / "b.mp4"
    short.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"b.mp4: is no video that can be read"):
        VideoFrames(short, np.zeros(1), 0.05)[0]
    with pytest.raises(DataError, match=r"c.mp4: is no video that can be read"):
        VideoFrames(tmp_path / "c.mp4", np.zeros(1), 0.05)[0]


def test_frames_are_decoded_once_in_order(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    write_video(path, [(7 * i) % 200 for i in range(60)])
    frames = VideoFrames(path, np.arange(60) / 10, 0.05)
    frames[0]
    seeks = []
    container = video._open(str(path), video.os.getpid()).container

    class Watched:
        def __getattr__(self, name):
            return getattr(container, name)

        def seek(self, *args, **kwargs):
            seeks.append(args)
            container.seek(*args, **kwargs)

    video._open(str(path), video.os.getpid()).container = Watched()
    for step in range(60):
        for back in (2, 1, 0):  # a history of three steps
            assert frames[max(0, step - back)].mean() == pytest.approx(7 * max(0, step - back) % 200, abs=6)
    assert not seeks
    frames[3]
    assert len(seeks) == 1


def test_processes_do_not_share_an_open_video(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    write_video(path, [50, 60, 70, 80])
    frames = VideoFrames(path, np.arange(4) / 10, 0.05)
    assert frames[0].mean() == pytest.approx(50, abs=4)
    other = pickle.loads(pickle.dumps(frames))  # the open file does not travel
    ours = video._open(str(path), video.os.getpid())
    monkeypatch.setattr(video.os, "getpid", lambda: -1)  # as in a forked worker
    ours.container.close()
    assert other[3].mean() == pytest.approx(80, abs=4)
