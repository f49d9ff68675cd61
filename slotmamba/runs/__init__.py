"""Looking at runs from outside: from what they leave in their folders, and what a scheduler says of their jobs."""
