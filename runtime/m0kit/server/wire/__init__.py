"""What goes over the wire: requests of several dialects to one `Ask`, results to answers. No work is done here."""
