"""What a campaign of `shortstack bench` measures: models, and the plan of cases."""
