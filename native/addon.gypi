# The addon for node-gyp, on machines without CMake: with the sources and flags of CMakeLists.txt.
# binding.gyp includes it; package managers would compile on install if that file were shipped, so
# `npx node-sdpa build` writes one.
{
  'includes': ['sources.gypi'],
  'targets': [
    {
      'target_name': 'node_sdpa',
      'sources': ['<@(sdpa_sources)'],
      'include_dirs': [
        '.',
        '<!(node -p "require(\'node-addon-api\').include_dir")',
        '<!(node -p "require(\'node-api-headers\').include_dir")',
      ],
      'defines': [
        '<@(sdpa_defines)',
        'SDPA_VERSION="<!(node -p "require(\'./package.json\').version")"',
      ],
      'cflags!': ['-fno-exceptions', '-O2'],
      'cflags_cc!': ['-fno-exceptions', '-fno-rtti', '-std=gnu++17', '-std=gnu++20'],
      'cflags_cc': ['<@(sdpa_compile_flags)', '<@(sdpa_release_flags)'],
      'conditions': [
        ['OS == "linux"', {
          'cflags_cc': ['<@(sdpa_hardening_flags_linux)'],
          'ldflags': ['<@(sdpa_link_flags_linux)'],
        }],
        ['OS == "mac"', {
          'xcode_settings': {
            'GCC_ENABLE_CPP_EXCEPTIONS': 'YES',
            'GCC_ENABLE_CPP_RTTI': 'YES',
            'CLANG_CXX_LANGUAGE_STANDARD': 'c++17',
            'OTHER_CPLUSPLUSFLAGS': ['<@(sdpa_compile_flags)', '<@(sdpa_release_flags)'],
          },
        }],
      ],
    },
  ],
}
