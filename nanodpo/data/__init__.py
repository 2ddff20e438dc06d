"""From files to token ids, and the order in which training visits them.

Read rows (files to rows and columns), template and rendering (turns to text), texts (a row's columns to prompt, chosen
and rejected), tokens (texts to ids, limits, the data set), example (one row in ids) and schedule (which rows at which
step). problems tells which rows belong together, inspection prints them.
"""
