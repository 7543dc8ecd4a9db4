// The functions of jstat that are used here; the package comes without types.
declare module 'jstat' {
  const jStat: {
    readonly studentt: { inv(probability: number, degrees: number): number };
    /** The complementary error function. */
    erfc(x: number): number;
    /** The lower incomplete gamma function, regularized. */
    lowRegGamma(a: number, x: number): number;
  };
  export default jStat;
}
