"""Every setting of a run. Read arguments (the flags of train.py), limits (the values that they may have), settings
(files of settings, and the launcher's environment) and unknown (hints for flags that do not exist)."""
