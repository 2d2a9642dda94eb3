// What the user's training logged: rows as they come, one source a name.

run.logged.forEach((rows, i) => (SOURCES[`logged_${i}`] = () => rows));
