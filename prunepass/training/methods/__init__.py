"""What is learned and searched, and how: losses, gates, budgets, schedules, plans."""
