"""What a job did, for people."""
