"""From files to token ids, and the order in which training visits them.

Read rows (files to rows), shapes (rows of any shape to prompt, chosen and rejected), template and rendering (messages
to text), texts (prompt, chosen and rejected as text), tokens (texts to ids, limits, the data set), example (one row in
ids) and schedule (which rows at which step). problems tells which rows belong together, inspection prints them.
"""
