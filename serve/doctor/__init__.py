"""`tandem doctor`: what of the machine, the settings and the servers that they name would keep this server from
working, and what to change. It changes nothing, but for probes that it writes and removes again."""
