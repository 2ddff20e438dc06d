"""What plot.py adds: tables read back and checked, a figure each, and the files they become."""

import os

# A notebook sets it for its own figures; matplotlib reads it when it is imported, and refuses what it does not know.
os.environ["MPLBACKEND"] = "agg"
