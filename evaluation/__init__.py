"""AutoAttack on trained networks: verdicts per image, and reports."""
