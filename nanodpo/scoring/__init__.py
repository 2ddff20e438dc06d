"""What score.py adds: what is scored, what is measured along it, and the tables."""
