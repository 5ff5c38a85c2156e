"""Pipeline parallelism: schedules as tables of actions, what they cost, and how a rank runs its part."""
