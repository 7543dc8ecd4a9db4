// The one function of jstat that is used here; the package comes without types.
declare module 'jstat' {
  const jStat: { readonly studentt: { inv(probability: number, degrees: number): number } };
  export default jStat;
}
