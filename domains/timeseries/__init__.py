"""Time series: forecasts with their uncertainty."""
