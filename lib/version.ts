// The version of this package, as in package.json, which a bundle leaves behind.

export const PACKAGE_VERSION = '0.1.0';
