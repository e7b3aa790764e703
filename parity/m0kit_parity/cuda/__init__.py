"""An artifact on a GPU: what can be proven without one, its operators in numpy."""
