-- ARGV: settings, id. Answers the snapshot; its first half is empty when there is no such job.
return {ended, snapshot(ARGV[4])}
