// What the commands of this folder share: numbers on the command line, mistakes in one line.
import { SafetensorsError } from './safetensors';
import { UsageError } from './text';

/** Where `train` keeps its run and `sample` looks for it. */
export const CHECKPOINT = 'out/gpt.safetensors';

/** Runs a command; a mistake of the user's is one line and exit status 1. */
export async function runCommand(command: () => void | Promise<void>): Promise<void> {
  await Promise.resolve(); // the file that calls this is read to its end first
  try {
    await command();
  } catch (error) {
    if (!isMistake(error)) throw error;
    console.error(error.message);
    process.exitCode = 1;
  }
}

function isMistake(error: unknown): error is Error {
  if (error instanceof UsageError || error instanceof SafetensorsError) return true;
  const { code = '' } = error as NodeJS.ErrnoException;
  return code.startsWith('ERR_PARSE_ARGS') || ['ENOENT', 'EACCES', 'EISDIR'].includes(code);
}

/** A number of the command line within limits. @throws UsageError where it is something else */
export function readNumber(name: string, text: string, least: number, most = Infinity): number {
  const value = Number(text);
  if (text.trim() !== '' && value >= least && value <= most) return value;
  const range = most === Infinity ? `from ${least} on` : `from ${least} to ${most}`;
  throw new UsageError(`--${name}: expected a number ${range}, got ${JSON.stringify(text)}`);
}

/** As {@link readNumber}, without fractions. */
export function readCount(name: string, text: string, least: number, most = 1e9): number {
  const value = readNumber(name, text, least, most);
  if (Number.isInteger(value)) return value;
  throw new UsageError(`--${name}: expected a whole number, got ${text}`);
}
