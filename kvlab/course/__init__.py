"""What only the notebooks need: plots, widgets, exercises, recorded results, the doctor."""
