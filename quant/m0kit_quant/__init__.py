"""How weights become fewer bits: schemes and recipes. Full precision needs only what is here."""
