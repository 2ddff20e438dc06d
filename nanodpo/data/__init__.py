"""From files to token ids, and the order in which training visits them.

Read places (names to files) and urls (those of other machines), rows (files to rows) with text_files and tables, shapes
(rows of any shape to prompt, chosen and rejected) with messages (in any form) and answers (lists of these, and
weights), marks, template and rendering (messages to text), transcripts (text that is rendered already), texts (prompt,
chosen and rejected as text) with closing (how each answer ends), encoding (texts to ids), example (one row in ids),
prepared (all rows in ids) with forks (the processes that share the work), tokens (the data set in ids) with limits
(rows that are too long), mixing (how often an epoch has a row) and schedule (which rows at which step). problems tells
which rows belong together, inspection prints them.
"""
