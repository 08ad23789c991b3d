"""Many processes: see, price, plan, place, drive. The only user of Ray."""
