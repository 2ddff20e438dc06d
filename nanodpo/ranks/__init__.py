"""Several processes that make one run, on one machine or several. Read waits (how long they wait for each other),
meeting (they find each other at the start), peers (watches whether the others still live) and distributed (exchanges
values between them); gpu is what each sets before it uses a GPU."""
