"""The command `tl-nodeprune`: arguments in, words or JSON out.

Nothing is imported here: `shell` comes before the imports that take seconds.

main    the subcommands and their arguments
output  what they print, in words and as JSON
shell   an end without a traceback: Ctrl-C, a closed pipe, a wrong argument
"""
