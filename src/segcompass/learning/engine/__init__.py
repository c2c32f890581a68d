"""One process or many: the loop, its optimizer, its states, and what is sharded."""
