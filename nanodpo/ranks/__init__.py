"""Several processes that make one run. Read distributed (joins them, and exchanges values between them) and peers
(watches whether the others still live)."""
