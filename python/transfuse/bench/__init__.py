"""How speed is measured here: one harness, one list of cases, one corpus; for the command, bench/ and make gpu."""
