"""Proof: how far a package is from its reference, stage by stage. Import the modules; nothing is loaded here."""
