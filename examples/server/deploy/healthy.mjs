// Exits with 0 where the server of this machine says that it is well; for Docker.
const { ok } = await fetch('http://127.0.0.1:8080/healthz');
process.exit(ok ? 0 : 1);
