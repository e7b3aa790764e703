"""Every published figure, remade on the machine at hand."""
