"""How speed is measured here: one harness, one list of cases, one corpus; used by the command, by bench/ and by make gpu."""
