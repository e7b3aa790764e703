"""What values and files of somebody else hold: text, images, lines."""
