"""Every setting of a run. Read arguments (the flags of train.py), help (the text of --help), limits (the values that
flags may have), loss (what --loss names), settings (files of them), launchers (the environment that they leave) and
unknown (hints for flags that do not exist)."""
