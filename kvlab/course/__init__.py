"""Support for the notebooks: plots, widgets, exercises, recorded results, and the doctor."""
