"""What a network is and what follows from it; no word of how it is computed."""
