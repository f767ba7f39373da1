"""The report of a run, made from the files in its folder, without torch."""
