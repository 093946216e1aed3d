"""What two or more tasks share: mechanisms, data, engine, reports."""
