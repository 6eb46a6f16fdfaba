"""One file a method: expert weights, statistics and a budget in, compressed experts out."""
