"""Action: demonstrations to tokens and back, chunks for recorded observations, the policy at work in a simulator."""

from __future__ import annotations

import json

from vertebra.pipelines.demo.base import Demo


def show(demo: Demo) -> None:
    """Run the pipelines of the domain and show what they write."""
    samples, results, report = demo.samples, demo.results, demo.report
    report.section("action/tokenize: demonstrations of a seven-joint arm")
    tokens = demo.run(
        "action/tokenize", [samples / "arm"], "tokens.npz", "--tokenizer bspline,num_basis=8 --gripper gripper"
    )
    facts = json.loads(tokens.with_name("tokens.npz.json").read_text(encoding="utf-8"))
    rows = [(joint["name"], joint["rmse"], joint["largest"]) for joint in facts["joints"]]
    report.table(rows, ("column", "RMSE", "largest error"))
    per_chunk = facts["tokens_per_chunk"]
    report.facts({"chunks": facts["chunks"], "tokens a chunk": per_chunk["mean"], "by binning": per_chunk["binning"]})
    report.image(results / "tokens.npz.png", "What was demonstrated, and what the tokens say.")
    report.text("Tokens say actions at any rate of control; here at 50 a second instead of 20.")
    demo.run("action/tokenize", [tokens], "back.csv", "--steps-per-second 50")

    report.section("action/predict: recorded observations")
    chunks = demo.run("action/predict", [samples / "held_out"], "chunks.csv")
    facts = json.loads(chunks.with_name("chunks.csv.json").read_text(encoding="utf-8"))
    found = [("policy", facts["rmse_all"]), ("staying where it is", facts["hold_rmse_all"])]
    report.table(found, ("", "RMSE of the next second (rad; gripper 0 to 1)"))
    report.facts({"decisions": facts["decisions"], "ms a decision": facts["decision_ms"]})
    caption = "What was done, and what the policy would have done from each decision on."
    report.image(results / "chunks.csv.png", caption)

    report.section("action/predict: closed loop")
    rollouts = demo.run("action/predict", [], "rollouts.csv", "--sim ArmPick --episodes 24 --execute 10")
    facts = json.loads(rollouts.with_name("rollouts.csv.json").read_text(encoding="utf-8"))
    names = ("episodes", "success", "success_low", "success_high", "steps_to_success", "jerk", "decision_ms")
    report.facts({name: facts[name] for name in names})
    caption = "The first episode, on places of the table that training never saw."
    report.image(results / "rollouts.csv.film.png", caption)
    report.image(results / "rollouts.csv.png", "The path of all episodes.")

    report.section("action/tokenize: damaged files")
    damaged = demo.run("action/tokenize", [samples / "damaged"], "damaged.npz", "--gripper gripper")
    demo.damaged(damaged.with_name("damaged.npz.errors.jsonl"), "damaged files are listed")
