-- ARGV: settings, most jobs. The ended jobs whose record's time is over, the oldest first.
return {ended, redis.call('ZRANGEBYSCORE', ENDED, '-inf', now, 'LIMIT', 0, ARGV[4])}
