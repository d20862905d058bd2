"""What tests share: a small project, doubles of servers, and upstream's own command."""
