"""Full-screen terminal chat. Until it exists, `ohmygpu.cli.repl` holds the chat by lines."""
