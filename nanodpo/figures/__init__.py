"""What plot.py adds: tables read back and checked, a figure each, and the files they become."""
