"""nanodpo: a minimal, exact DPO and SFT trainer. The scripts train.py, score.py and plot.py are the way in."""
