"""What is done to a batch: images are encoded, tokens selected, inputs shortened, attention kept in proportion."""
