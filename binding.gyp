# For node-gyp in a checkout; never part of the package.
{ 'includes': ['native/addon.gypi'] }
