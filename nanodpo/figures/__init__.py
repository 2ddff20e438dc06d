"""Draws runs and scorings: tables read back and checked, a figure each, and their files.

Read tables, records and runs (what is read back), selection and choice (what is drawn of it), intervals and noise;
then a figure each: training, difference, dynamics, bars, aside, heatmap, scatter, ledger, strip, three_panel; axes,
letters (fonts for those of East Asia) and drawing make the figures and files, after the ones that nobody asks for.
page, with page_tables and pairs, writes a web page of single tokens, by page.html.
"""

import os

# A notebook sets it for its own figures; matplotlib reads it when it is imported, and refuses what it does not know.
os.environ["MPLBACKEND"] = "agg"
