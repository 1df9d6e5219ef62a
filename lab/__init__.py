"""What is measured and planned: the judge, the claims, speed, costs, figures (3)."""
