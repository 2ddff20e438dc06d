"""Every setting: arguments (the flags of train.py), limits (which values they may have), settings (files and the
launcher's environment) and unknown (what a flag that is not there may have meant)."""
