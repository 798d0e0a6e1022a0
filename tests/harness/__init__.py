"""What the tests share: child processes to kill, and a real Dapr runtime to run on."""
