"""What all of these need: names, files, cards, figures, progress, processes, a user's own code."""
